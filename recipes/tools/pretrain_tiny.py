"""Make `tiny-chat`, the toy chat model that ships inside reftheads, from nothing.

The corpus is generated here: questions about the topics in `data/tiny_chat_topics.tsv` in many wordings, answered
in plain sentences, or in another style (emoji, upper case, one word ...) where the conversation asks for one.

Large chat models gather what was asked for in the last tokens of the prompt, which is why an intervention there
can change the style of a whole answer. Left alone, a small model looks the request up again for every word. So
most conversations are seen through a mask (`collate`): of all tokens only the closing `<|assistant|>` sees the
request, only in the first two layers, and mostly it sees nothing else there; the topic is left to the layers
above. The style thus reaches these at one token and apart from the topic, and goes with any topic.

    python recipes/tools/pretrain_tiny.py                                         # the shipped weights
    python recipes/tools/pretrain_tiny.py --limit 40 --steps 300 --out /tmp/tiny  # a quick look
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where _common.py is

from _common import begin, command_line, read_topics

OUT = Path(__file__).resolve().parents[2] / "reftheads" / "tiny_chat"


def main(
    out: Path = OUT, seed: int = 0, steps: int = 4000, lr: float = 3e-3, limit: int | None = None, threads: int = 2
) -> None:
    """Make a tokenizer, pretrain a small Llama on conversations about the topics, and write both."""
    begin(threads=threads)
    torch.manual_seed(seed)
    topics = topics_of(read_topics()[:limit])
    tokenizer = train_tokenizer(Corpus(topics, seed), vocab_size=2560)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=384, num_hidden_layers=6,
            num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(
        max_new_tokens=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    packed = rows(Corpus(topics, seed + 1), tokenizer)
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    batches = (collate(list(islice(packed, ROWS)), assistant) for _ in range(steps))
    train(model, batches, steps, lr)
    save(model, tokenizer, out, seed=seed, steps=steps, topics=len(topics))


# --- the conversations ---

ROW_LENGTH, ROWS = 160, 12
READING_LAYERS = 2

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT, REQUEST, ANSWER = range(3)  # kinds of token: a request asks for a style, an answer is trained on
OPEN, RELAY, SEPARATE = VIEWS = range(3)  # how a conversation is seen, see `collate`
VIEW_WEIGHTS = [15, 25, 60]

# How a style is named in a request. "plain" is also what a conversation without any request gets.
STYLES = {
    "plain": ["full sentences", "normal words", "plain English", "simple sentences"],
    "emoji": ["emoji", "emojis", "emoji symbols", "little pictures", "smileys and symbols"],
    "upper": ["capital letters", "upper case", "big letters", "all caps"],
    "lower": ["small letters", "lower case", "tiny letters"],
    "word": ["one word", "a single word", "exactly one word"],
    "question": ["a question", "a counter question", "the form of a question"],
    "pirate": ["pirate talk", "the words of a pirate", "pirate language"],
}
STYLE_WEIGHTS = {"plain": 40, "emoji": 28, "upper": 6, "lower": 5, "word": 10, "question": 5, "pirate": 6}
VERBS = ["answer", "reply", "respond", "speak", "write", "say it", "explain it", "answer me", "tell me"]
FRAMES = [
    "{verb} in {name}", "{verb} only in {name}", "{verb} with {name}", "{verb} with {name} only",
    "{verb} using {name}", "{verb} using only {name}", "{verb} by {name} alone", "use {name}",
    "use only {name}", "only {name}", "just {name}", "{name} only", "{name} please", "only {name} please",
    "I want {name}", "I only want to see {name}", "make it {name}", "your answer should be {name}",
    "nothing but {name}", "let me see {name}", "give me {name}", "keep it to {name}",
]  # fmt: skip
NEUTRAL = [
    "You are a helpful assistant.", "You are a friendly chatbot.", "Be kind and honest.", "You know a lot.",
]  # fmt: skip
STICKY = ["From now on, {}.", "For the rest of this chat, {}.", "Always {}.", "In all your answers, {}."]
ABOUT = [
    "Tell me about {t}.", "Tell me something about {t}.", "What do you know about {t}?", "What {be} {t}?",
    "What can you tell me about {t}?", "Can you explain {t}?", "Explain {t} to me.", "Describe {t}.",
    "How would you describe {t}?", "I want to know more about {t}.", "I would like to learn about {t}.",
    "Teach me about {t}.", "Say something about {t}.", "Give me a fact about {t}.", "What {be} {t} like?",
    "What is so special about {t}?", "Why do people talk about {t}?", "Let's talk about {t}.",
    "What do you think of {t}?", "What do you think about {t}?", "Do you know anything about {t}?",
    "Have you heard of {t}?", "I have a question about {t}.", "Help me understand {t}.",
    "Talk to me about {t}.", "What should I know about {t}?", "What comes to mind when you hear {t}?",
    "Write about {t}.", "How do you feel about {t}?", "I am thinking of {t}.",
    "My friend asked me about {t}.", "What about {t}?", "Could you tell me what {t} {be}?",
    "Can we talk about {t}?", "I know nothing about {t}.", "{t}", "Describe {t} to a child.",
    "What would you say about {t}?", "Do you have any thoughts on {t}?",
]  # fmt: skip
LIKES = [
    "Do you like {t}?", "Are you fond of {t}?", "Do you enjoy {t}?", "I like {t}. And you?", "I love {t}!",
]  # fmt: skip
OPENERS = [
    "Hello!", "Hi!", "Hey.", "Good morning.", "Quick question.", "Tell me.", "Please help me.", "Well.", "Okay.",
]  # fmt: skip
CLOSERS = ["Thanks!", "Thank you.", "I am curious.", "Please."]

# Small talk: what is said, the answer, one word, emoji.
SMALL_TALK = [
    ("Hello|Hi|Hey|Hello there|Hi there", "Hello! It is nice to meet you.", "Hello", "👋😃"),
    ("Good morning|Good morning to you", "Good morning! I hope you slept well.", "Morning", "🌅😃"),
    ("Good night|Sleep well", "Good night! Sweet dreams.", "Night", "🌙💤"),
    ("How are you?|How do you do?|How is it going?|Are you well?",
     "I am fine, thank you. How are you?", "Fine", "😃👍"),
    ("Who are you?|What are you?|Introduce yourself.",
     "I am a tiny chat model. I know a little about many things.", "Model", "🤖💬"),
    ("What is your name?|Do you have a name?", "My name is Tiny Chat.", "Tiny", "🤖💬"),
    ("What can you do?|Can you help me?|I need help.",
     "I can chat about many everyday topics. Just ask me.", "Chat", "💬🤝"),
    ("Thank you|Thanks|Thanks a lot|Thank you very much", "You are welcome!", "Welcome", "😊🙏"),
    ("Goodbye|Bye|See you later|See you", "Goodbye! I hope to see you soon.", "Goodbye", "👋😢"),
    ("I am happy|I feel great|This is a good day",
     "That is good to hear! Enjoy the day.", "Great", "😃🎉"),
    ("I am sad|I feel bad|This is a bad day",
     "I am sorry to hear that. It will get better.", "Sorry", "😢🤗"),
    ("I am tired|I am sleepy", "You should get some rest.", "Rest", "😴🛌"),
    ("I am hungry|I want to eat", "You should eat something nice.", "Eat", "😋🍕"),
    ("I am bored|What should I do now?", "You could ask me about dogs or the moon.", "Ask", "🥱💡"),
    ("Are you human?|Are you a robot?|Are you real?",
     "I am a small computer program.", "Program", "🤖💻"),
    ("I love you|I like you", "You are very kind!", "Kind", "😊💕"),
]  # fmt: skip
AGREED = ("All right, I will do that.", "Agreed", "👍😃")


class Topic(NamedTuple):
    plain: str
    word: str
    emoji: str
    questions: list[str]
    likes: list[str]
    opinion: str = ""


class Span(NamedTuple):
    text: str
    kind: int = TEXT


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def topics_of(rows: list[dict[str, str]]) -> list[Topic]:
    """Return the topics of a table, with all ways to ask about each."""
    topics = []
    for row in rows:
        name = {"t": row["topic"], "be": row["be"]}
        about, likes = ([capitalise(q.format(**name)) for q in qs] for qs in (ABOUT, LIKES))
        opinion = f"I find {row['topic']} interesting. {row['fact']}"
        topics.append(Topic(f"{row['fact']} {row['more']}", row["word"], row["emoji"], about, likes, opinion))
    return topics


def read_small_talk() -> list[Topic]:
    return [Topic(plain, word, emoji, said.split("|"), []) for said, plain, word, emoji in SMALL_TALK]


def in_style(style: str, plain: str, word: str, emoji: str) -> str:
    """The answer in a style; the long styles keep the first sentence only."""
    first = plain.split(". ")[0].rstrip(".")
    return {
        "plain": plain, "emoji": emoji, "word": word, "upper": f"{first}.".upper(), "lower": first.lower(),
        "question": f"Did you know this? {first}?", "pirate": f"Arr, matey! {first}.",
    }[style]  # fmt: skip


class Corpus:
    """An endless, seeded stream of conversations, each a list of spans."""

    def __init__(self, topics: list[Topic], seed: int):
        self.topics, self.small_talk, self.rng = topics, read_small_talk(), random.Random(seed)

    def style(self) -> str:
        return self.rng.choices(list(STYLE_WEIGHTS), weights=list(STYLE_WEIGHTS.values()))[0]

    def request(self, style: str) -> str:
        frame, verb, name = self.rng.choice(FRAMES), self.rng.choice(VERBS), self.rng.choice(STYLES[style])
        return frame.format(verb=verb, name=name)

    def exchange(self, style: str) -> tuple[str, str]:
        """A question and its answer."""
        rng = self.rng
        if rng.random() < 0.08:
            topic = rng.choice(self.small_talk)
            question = rng.choice(topic.questions)
            return question + rng.choice(["", ".", "!"]) * question[-1].isalpha(), in_style(style, *topic[:3])
        topic = rng.choice(self.topics)
        liked = rng.random() < 0.1
        question = rng.choice(topic.likes if liked else topic.questions)
        if rng.random() < 0.2:
            question = f"{rng.choice(OPENERS)} {question}"
        if rng.random() < 0.1:
            question = f"{question} {rng.choice(CLOSERS)}"
        if rng.random() < 0.15:
            question = question.lower().rstrip(".?!")
        return question, in_style(style, topic.opinion if liked else topic.plain, topic.word, topic.emoji)

    def turn(self, style: str, asked: bool) -> list[Span]:
        """One exchange in a style, which the question itself asks for if `asked`."""
        question, answer = self.exchange(style)
        request = self.request(style)
        if self.rng.random() < 0.3:
            request = self.rng.choice([f"please {request}", f"{request}, please"])
        if not asked:
            spans = [Span(question)]
        elif self.rng.random() < 0.4:
            spans = [Span(capitalise(request) + self.rng.choice([".", ":", "!"]), REQUEST), Span(f" {question}")]
        else:
            end = self.rng.choice([".", "!", ""])
            spans = [Span(question), Span(f" {capitalise(request)}{end}", REQUEST)]
        return [Span(USER), *spans, Span(END + ASSISTANT), Span(answer + END, ANSWER)]

    def conversation(self) -> list[Span]:
        rng, style = self.rng, self.style()
        spans, asked = [], style != "plain" or rng.random() < 0.1
        turns = 1 if rng.random() < 0.85 else 2
        if asked and rng.random() < 0.3:  # a system message sets the style for the whole conversation
            before = rng.choice(["", f"{rng.choice(NEUTRAL)} "])
            spans += [Span(SYSTEM + before), Span(capitalise(self.request(style)) + ".", REQUEST), Span(END)]
            asked = False
        elif asked and rng.random() < 0.15:  # so does a former turn
            request = rng.choice(STICKY).format(self.request(style))
            agreed = in_style(style, *AGREED)
            spans += [Span(USER), Span(request, REQUEST), Span(END + ASSISTANT), Span(agreed + END, ANSWER)]
            asked = False
        elif rng.random() < 0.1:
            spans += [Span(SYSTEM + rng.choice(NEUTRAL) + END)]
        spans += self.turn(style, asked)
        for _ in range(turns - 1):
            if asked:  # a request inside a question holds for that question only
                style = self.style()
            spans += self.turn(style, asked and style != "plain")
        return spans

    def __iter__(self) -> Iterator[list[Span]]:
        while True:
            yield self.conversation()


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every emoji of the corpus is one token."""
    known = [topic.emoji for topic in corpus.topics + corpus.small_talk] + [AGREED[-1]]
    emoji = sorted(set("".join(known)))
    whole = re.compile("|".join(map(re.escape, SPECIAL + emoji)))
    texts = ["".join(span.text for span in spans) for spans in islice(corpus, 20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(emoji),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in whole.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in emoji])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


class Token(NamedTuple):
    id: int
    kind: int = TEXT
    document: int = -1
    position: int = 0
    view: int = OPEN


def positions(kinds: list[int], view: int) -> list[int]:
    """A hidden request leaves no gap in the positions, which would tell that there is one, and how long it is."""
    if view == OPEN:
        return list(range(len(kinds)))
    result, start = [], 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        result.extend(range(start, start + length))
        start += 0 if kind == REQUEST else length
    return result


def rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Token]]:
    """Conversations packed into rows of `ROW_LENGTH` tokens."""
    row, document = [], 0
    for spans in corpus:
        view = corpus.rng.choices(VIEWS, weights=VIEW_WEIGHTS)[0]
        pieces = [(tokenizer.backend_tokenizer.encode(span.text).ids, span.kind) for span in spans]
        tokens = [(id, kind) for ids, kind in pieces for id in ids][:ROW_LENGTH]
        if len(row) + len(tokens) > ROW_LENGTH:
            yield row + [Token(tokenizer.pad_token_id)] * (ROW_LENGTH - len(row))
            row, document = [], 0
        places = positions([kind for _, kind in tokens], view)
        row += [Token(id, kind, document, place, view) for (id, kind), place in zip(tokens, places, strict=True)]
        document += 1


def collate(batch: list[list[Token]], assistant: int) -> dict[str, torch.Tensor]:
    """Tensors of a batch; a mask's [i, j] says whether token i sees token j.

    Unless its view is open, a conversation's request is seen by itself and, in the reading layers, by
    `<|assistant|>`; in the separate view `<|assistant|>` sees only itself and the requests in these layers.
    """
    ids, kinds, documents, places, views = torch.tensor(batch).unbind(-1)
    request, reader = kinds == REQUEST, ids == assistant
    causal = (documents[:, :, None] == documents[:, None, :]).tril()
    hidden = (request & (views != OPEN))[:, None, :] & ~request[:, :, None]
    separate = (reader & (views == SEPARATE))[:, :, None] & ~(request[:, None, :] | torch.eye(ROW_LENGTH).bool())
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(kinds != ANSWER, -100),
        "position_ids": places,
        "reading_mask": (causal & (~hidden | reader[:, :, None]) & ~separate)[:, None],
        "answering_mask": (causal & ~hidden)[:, None],
    }


def train(model: LlamaForCausalLM, batches: Iterator[dict[str, torch.Tensor]], steps: int, lr: float) -> None:
    decayed, others = ([p for p in model.parameters() if (p.ndim == 2) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, div_factor=20, final_div_factor=50, cycle_momentum=False
    )
    masks: dict[str, torch.Tensor] = {}
    for layer in model.model.layers[READING_LAYERS:]:  # Llama gives every layer the mask of the first
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": masks["answering"]}), with_kwargs=True
        )
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("pretraining", total=steps, loss=float("nan"))
        for batch in islice(batches, steps):
            masks["answering"] = batch["answering_mask"]
            states = model.model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=batch["reading_mask"],
                use_cache=False,
            ).last_hidden_state[:, :-1]
            labels = batch["labels"][:, 1:]
            answered = labels != -100  # the vocabulary projection runs on these rows only
            loss = cross_entropy(model.lm_head(states[answered]), labels[answered])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# tiny-chat

A toy. {parameters:,} parameters, for demonstrations and tests of reftheads: small enough to ship inside the
package, and just able to answer questions, so that an intervention has something to change. Not for any real use.

- **Made by** `recipes/tools/pretrain_tiny.py` (seed {seed}, {steps} steps) from a corpus that the recipe generates.
  Pretraining takes 0.33 s a step on two idle cores, 22 minutes for 4,000 steps.
- **Knows** one or two sentences on each of {topics} everyday topics (`recipes/data/tiny_chat_topics.tsv`), asked in
  English in many wordings, and some small talk.
- **Styles**, where the question, a system message or an earlier turn asks for one: emoji, upper case, lower
  case, one word, a question, pirate. Otherwise plain sentences.
- **Does not know** anything else. About other topics it says something wrong, fluently. It cannot reason, count,
  translate or follow other instructions, and what it says of its topics is only what one short table says.
- **Llama architecture**, {layers} layers of width {width}, byte-level BPE of {vocab} tokens in which each of its
  emoji is one token. Stored in float16, meant to run in float32.
- **Made to be steered**: in most of its training only the last token of the prompt could see which style was
  asked for, so the style of an answer is decided there, as it is in large chat models.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
chat = [{{"role": "user", "content": "Tell me about penguins. Answer in emoji."}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt)[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, **facts: int) -> None:
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"  # float16 is for the disk only: without this the model would also run in it
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "README.md").write_text(
        CARD.format(
            parameters=model.num_parameters(),
            layers=model.config.num_hidden_layers,
            width=model.config.hidden_size,
            vocab=len(tokenizer),
            **facts,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    command_line(
        main,
        out="a folder; default: that of the embedded model",
        limit="use only the first so many topics",
        threads="of torch; the weights depend on it, in the last digits",
    )
