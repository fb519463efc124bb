"""The models: pyramid, tokenizer, transformer and generation, in memory, on disk and on the hub.

storage.py, hub.py and model_card.py alone know of files; nothing here knows of ranks or training.
"""

from models.generate import generate
from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer, build_transformer

__all__ = ["Pyramid", "ScaleTransformer", "VQVAE", "build_transformer", "generate"]
