"""LightningDataModules: digits, folders of images, labelled text."""

from lit_cka.data.digits import DigitsDataModule
from lit_cka.data.images import ImageFolderDataModule
from lit_cka.data.text import TextDataModule

__all__ = ["DigitsDataModule", "ImageFolderDataModule", "TextDataModule"]
