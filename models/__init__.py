"""The models: pyramid, tokenizer, transformer and generation. Nothing here knows of files, ranks or training."""

from models.generate import generate
from models.pyramid import Pyramid
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer, build_transformer

__all__ = ["Pyramid", "ScaleTransformer", "VQVAE", "build_transformer", "generate"]
