"""A census over the model types of transformers: is the library right there, or does it refuse with a reason?"""
