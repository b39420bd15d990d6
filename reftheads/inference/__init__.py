"""Using a trained model: answers, conversations, predictions of heads."""

from reftheads.inference.conversation import chat, reply
from reftheads.inference.prediction import predict

__all__ = ["chat", "predict", "reply"]
