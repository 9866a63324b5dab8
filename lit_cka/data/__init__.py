"""LightningDataModules: digits, folders of images, labelled text; and test sets of all of these.

Any other data works as well; samples for `lit_cka.analysis` are read there.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
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

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "digit_shifts": ["DigitShiftsDataModule"],
        "digits": ["DigitsDataModule"],
        "images": ["ImageFolderDataModule"],
        "language": ["LanguageTestsDataModule"],
        "shifts": ["ImageNetShiftsDataModule"],
        "test_sets": ["ImageFolderTestsDataModule", "TestSet", "TestSetsDataModule"],
        "text": ["TextDataModule"],
        "text_tests": ["TextTestsDataModule"],
    },
)
