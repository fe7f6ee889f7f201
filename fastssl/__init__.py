"""fastssl: fast, trustworthy queue-based contrastive pretraining of image encoders."""

__version__ = "0.1.0"
