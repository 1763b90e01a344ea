# SPDX-License-Identifier: Apache-2.0
"""The processor: counts come from vLLM's own placeholders, which are built and then shortened."""

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image
from vllm.config.multimodal import ImageDummyOptions
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.explain_request import Placed
from flashvlm_vllm.ipc.item_fields import MODALITIES, VISION_CHUNK, field_name
from flashvlm_vllm.lru import put_bounded
from flashvlm_vllm.models.general.inputs import layout_of
from flashvlm_vllm.models.general.placeholder import Placeholder
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.processing.vision_chunks import image_data
from flashvlm_vllm.request.budget import BUDGET, TokenCount
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.refusal import Reason, Refusal

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers

PLACEHOLDER, INPUTS = "placeholder", "inputs"
_CACHED_PLACEHOLDERS = 10_000
_DRAWN = (224, 168)
"""Width and height of the image of the self-check, in pixels."""


class GeneralProcessor(VisualTokenProcessor):
    """Mixin of any of vLLM's processors."""

    counts_whole_items: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._placeholders: dict[str, tuple[Placeholder, Any]] = {}
        self._checking: int | None = None
        """The thread that runs the self-check, whose own request is not refused."""
        self._check_lock = threading.Lock()

    def own_request(self, request: VisualRequest, items: MultiModalDataItems) -> VisualRequest:
        """Refuse a budget if the self-check failed.

        Raises:
            Refusal: the check failed, and the request or the server has a budget.

        """
        is_own = self._checking == threading.get_ident()
        if not is_own and self.asks(request) and self.why_not is not None:
            raise Refusal(
                Reason.NOT_COVERED,
                f"{BUDGET}: {type(self).__name__} cannot prune: {self.why_not}; send {BUDGET}: "
                "null, or nothing if the server has no default",
                parameter=BUDGET,
            )
        return request

    @cached_property
    def why_not(self) -> str | None:
        """Why budgets are refused: the self-check's error; ``None`` if it held.

        One drawn image is pruned to half. Its placeholder must have exactly these tokens.
        """
        with self._check_lock:
            self._checking = threading.get_ident()
            try:
                return self._error_of_one_prune()
            # Whatever vLLM's processor raises here, it would raise for every request with a budget.
            except Exception as error:
                logger.warning("flashvlm: the self-check failed", exc_info=True)
                return f"pruning a drawn image failed ({type(error).__name__}: {error})"
            finally:
                self._checking = None

    def _error_of_one_prune(self) -> str | None:
        drawn = self._data_of(Image.linear_gradient("L").resize(_DRAWN).convert("RGB"))
        (modality,) = drawn
        tokens = {}
        for budget in (None, 0.5):
            given = self._prompt_about(drawn)
            given.hf_processor_mm_kwargs = {BUDGET: budget}
            result = self.apply(given, TimingContext(enabled=False))
            (placed,) = result["mm_placeholders"][modality]
            tokens[budget] = placed.get_num_embeds()
        whole, kept = tokens[None], tokens[0.5]
        if kept != TokenCount(whole, whole).kept(0.5):
            return f"of {whole} visual tokens {kept} stayed where half were asked for"
        return None

    def _prompt_about(self, data: Mapping[str, Any]) -> ProcessorInputs:
        """Return a prompt with one image, given as vLLM takes it."""
        (modality,) = data
        text = self.dummy_inputs.get_dummy_text({modality: 1})
        if not text:
            # Placeholders that no text stands for: the model's own prompt has them.
            size = ImageDummyOptions(1, width=_DRAWN[0], height=_DRAWN[1])
            return self.get_dummy_inputs(0, {modality: 1}, {modality: size})
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(self.info.get_tokenizer().encode(text), items)

    def count_item(
        self, items: Any, number: int, modality: str, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount | None:
        """Count the embeddings in vLLM's placeholder of an item, which is processed for it."""
        if items.get(number) is None:
            return None
        total = self._whole(items, number, modality, arguments)[0].tokens
        return TokenCount(total, total)

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the visual tokens of an image of this size, of which a blank one is processed."""
        data = self._data_of(Image.new("RGB", (width, height)))
        (modality,) = data
        items = self.info.parse_mm_data(data)[modality]
        total = self._whole(items, 0, modality, arguments)[0].tokens
        return TokenCount(total, total)

    def _data_of(self, image: Image.Image) -> dict[str, list[Any]]:
        return image_data(image, in_chunks=VISION_CHUNK in self.info.supported_mm_limits)

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten each run of visual tokens to its share; the text between runs is kept."""
        return whole if keep == count.total else Placeholder.of(whole).shortened(keep)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return nothing: which region a run of tokens shows is not known."""
        return {}

    def own_inputs(
        self, items: Any, modality: str, arguments: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, Any]:
        """Return each item's unpruned placeholder, and how its model inputs are put together."""
        every = [
            self._whole(items, number, modality, arguments, name)
            for number, name in enumerate(names)
        ]
        return {
            field_name(PLACEHOLDER, modality): [whole.to_tensor() for whole, _ in every],
            field_name(INPUTS, modality): [layout for _, layout in every],
        }

    def own_fields(self, inputs: Mapping[str, Any]) -> dict[str, MultiModalFieldConfig]:
        """Return the field configurations of `own_inputs`."""
        return {
            field_name(name, modality): MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in MODALITIES
            for name in (PLACEHOLDER, INPUTS)
            if field_name(name, modality) in inputs
        }

    def _whole(
        self,
        items: Any,
        number: int,
        modality: str,
        arguments: Mapping[str, Any],
        name: str | None = None,
    ) -> tuple[Placeholder, Any]:
        """Return an item's unpruned placeholder and the layout of its model inputs.

        The item's identity by its pixels is computed if ``name`` does not give it.
        """
        if name is None:
            own = self.alone(items, number, modality)[modality]
            (name,) = self.pixel_hashes(own, modality, arguments)
        found = self._placeholders.get(name)
        if found is None:
            alone = self.alone(items, number, modality)
            processed = self.processed(items, [number], modality, arguments, [name])
            item: MultiModalKwargsItem = processed[modality][0]
            updates = self.stock_updates(alone, arguments, processed)
            (content,) = (each.resolve(0).content for each in updates if each.modality == modality)
            found = Placeholder.of(content), layout_of(item)
            with self._lock:
                put_bounded(self._placeholders, name, found, _CACHED_PLACEHOLDERS)
        return found
