"""Testing masks and model families: Hypothesis strategies, ``assert_matches_dense``, a fuzzer, and ``check_family``. Requires
the extra ``testing``.

>>> from flexclear.masks import Disc, Layout
>>> from flexclear.testing import assert_matches_dense
>>> assert_matches_dense(Layout(9, 14, text_len=5), Disc(3), block_size=32, attention=False)
"""

from flexclear.common.extras import missing

try:
    import hypothesis as _hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("hypothesis", "flexclear.testing") from error

from flexclear.testing import strategies
from flexclear.testing.checks import assert_matches_dense
from flexclear.testing.family import FamilyReport, check_family
from flexclear.testing.fuzzing import Case, Report, fuzz

__all__ = ["Case", "FamilyReport", "Report", "assert_matches_dense", "check_family", "fuzz", "strategies"]
