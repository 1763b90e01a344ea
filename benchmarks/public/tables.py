# SPDX-License-Identifier: Apache-2.0
"""The tables: their tasks in lmms-eval, and their budgets.

Task and metric names are those of lmms-eval 0.7.3; a test compares them with an installed one.
"""

from dataclasses import dataclass
from typing import Final

from flashvlm_vllm.request.budget import Budget


@dataclass(frozen=True)
class Task:
    """A benchmark as the paper calls it, and as lmms-eval does.

    Attributes:
        dataset: the paper's name, a column of the table.
        name: lmms-eval's name; ``None`` where it has no such task.
        metric: which of the task's metrics is shown; all of them are kept.
        scale: what the metric is multiplied with, so that numbers look like the paper's.
        needs: environment variables without which lmms-eval's task does not load, or counts
            every answer as wrong because it has no judge.
    """

    dataset: str
    name: str | None
    metric: str = "exact_match"
    scale: float = 100.0
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table: its tasks, and the budgets that it has rows for.

    Attributes:
        title: what it shows.
        tasks: its columns.
        budgets: its rows; ``None`` is the model without pruning.
        frames: how many frames of a video are sent, each as an image with a budget of its own.
    """

    title: str
    tasks: tuple[Task, ...]
    budgets: tuple[Budget | None, ...]
    frames: int | None = None


VQAV2: Final = Task("VQAv2", "vqav2_val")
GQA: Final = Task("GQA", "gqa")
VIZWIZ: Final = Task("VizWiz", "vizwiz_vqa_val")
SCIENCEQA: Final = Task("ScienceQA-IMG", "scienceqa_img")
TEXTVQA: Final = Task("TextVQA", "textvqa_val")
POPE: Final = Task("POPE", "pope", "pope_f1_score")
MME: Final = Task("MME", "mme", "mme_perception_score", 1.0)
MMBENCH: Final = Task("MMBench", "mmbench_en_dev_static", "gpt_eval_score", 1.0)
MMBENCH_CN: Final = Task("MMBench-CN", "mmbench_cn_dev", "gpt_eval_score", 1.0)
MMVET: Final = Task("MM-Vet", "mmvet", "gpt_eval_score", 1.0, needs=("OPENAI_API_KEY",))
VIDEOS: Final = (
    Task("TGIF-QA", None),
    Task("MSVD-QA", None),
    Task("MSRVTT-QA", None),
    Task(
        "ActivityNet-QA",
        "activitynetqa",
        "gpt_eval_accuracy",
        1.0,
        needs=("OPENAI_API_KEY", "HF_HOME"),
    ),
)

TABLES: Final = {
    "1": Table(
        "ten image benchmarks, LLaVA-1.5",
        (
            *(VQAV2, GQA, VIZWIZ, SCIENCEQA, TEXTVQA),
            *(POPE, MME, MMBENCH, MMBENCH_CN, MMVET),
        ),
        (None, 128, 64, 32),
    ),
    # The paper keeps 455, 227 and 114 of the 2048 tokens of 8 frames; here a budget is per image.
    "2": Table("video benchmarks, as frames", VIDEOS, (None, 0.222, 0.111, 0.056), frames=8),
    "5": Table("ablations", (VQAV2, POPE, MMBENCH, MMVET, GQA), (None, 128, 64)),
    "8": Table(
        "other models: 128 tokens of Qwen-VL, 144 of InternVL-Chat, 123 of CogVLM",
        (VQAV2, GQA, VIZWIZ, SCIENCEQA, TEXTVQA),
        (None, 144, 128, 123),
    ),
    "10": Table(
        "high resolution, LLaVA-NeXT", (VQAV2, GQA, TEXTVQA, POPE, MME), (None, 640, 320, 160)
    ),
    "text": Table(
        "text in pictures, not in the paper",
        (
            Task("OCRBench", "ocrbench", "ocrbench_accuracy"),
            Task("DocVQA", "docvqa_val", "anls"),
            Task("ChartQA", "chartqa", "relaxed_overall"),
        ),
        (None, 288, 192, 128, 64),
    ),
    "scenes": Table(
        "drawn scenes, written on the spot", (Task("scenes", "drawn_scenes"),), (None, 64)
    ),
}
