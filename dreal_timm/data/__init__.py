"""Small real data sets, prepared for training without a download."""
from .digits import prepare_digits as prepare_digits
from .fashion_mnist import prepare_fashion_mnist as prepare_fashion_mnist
from .glyphs import prepare_glyphs as prepare_glyphs
