# SPDX-License-Identifier: Apache-2.0
"""An unpruned placeholder, how it is shortened, and how it is sent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.processing import PromptUpdateDetails

from flashvlm_vllm.models.general.placeholder import Placeholder

TEXT, IMAGE = 7, 9
TILES = PromptUpdateDetails.select_token_id(
    [TEXT, *[IMAGE] * 4, TEXT, TEXT, *[IMAGE] * 2, TEXT], IMAGE
)


def test_a_list_of_ids_is_all_embeddings() -> None:
    whole = Placeholder.of([IMAGE] * 5)
    assert whole.runs == [5]
    assert whole.tokens == 5
    assert whole.shortened(2).full == [IMAGE] * 2


def test_text_between_runs_stays_and_each_run_gets_its_share() -> None:
    whole = Placeholder.of(TILES)
    assert whole.runs == [4, 2]
    shorter = whole.shortened(3)
    assert shorter.full == [TEXT, IMAGE, IMAGE, TEXT, TEXT, IMAGE, TEXT]
    assert shorter.is_embed is not None
    assert shorter.is_embed(shorter.full).tolist() == [each == IMAGE for each in shorter.full]


@pytest.mark.parametrize("keep", [0, 6, 9])
def test_nothing_or_everything_is_kept(keep: int) -> None:
    kept = Placeholder.of(TILES).kept(keep)
    assert kept.sum() == 4 + min(keep, 6)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(1, 4)), min_size=1, max_size=9)
)
def test_what_is_sent_is_restored(runs: list[tuple[int, bool, int]]) -> None:
    ids = np.repeat([each for each, _, _ in runs], [count for _, _, count in runs])
    embedded = np.repeat([each for _, each, _ in runs], [count for _, _, count in runs])
    whole = Placeholder(ids, embedded)
    restored = Placeholder.from_tensor(whole.to_tensor())
    assert restored.ids.tolist() == whole.ids.tolist()
    assert restored.is_embed.tolist() == whole.is_embed.tolist()
    for keep in range(1, whole.tokens + 1):
        assert whole.is_embed[whole.kept(keep)].sum() == keep
