"""LightningDataModules: digits, folders of images, labelled text; and test sets of all of these.

Any other data works as well; samples for `lit_cka.analysis` are read there.
"""

from lit_cka.data.digit_shifts import DigitShiftsDataModule
from lit_cka.data.digits import DigitsDataModule
from lit_cka.data.images import ImageFolderDataModule
from lit_cka.data.language import LanguageTestsDataModule
from lit_cka.data.shifts import ImageNetShiftsDataModule
from lit_cka.data.test_sets import ImageFolderTestsDataModule, TestSet, TestSetsDataModule
from lit_cka.data.text import TextDataModule
from lit_cka.data.text_tests import TextTestsDataModule

__all__ = [
    "DigitShiftsDataModule",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "ImageFolderTestsDataModule",
    "ImageNetShiftsDataModule",
    "LanguageTestsDataModule",
    "TestSet",
    "TestSetsDataModule",
    "TextDataModule",
    "TextTestsDataModule",
]
