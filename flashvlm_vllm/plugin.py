# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point. vLLM calls it in every process, sometimes twice."""

import sys

from flashvlm_vllm.settings import is_enabled
from flashvlm_vllm.supported_models import classes
from flashvlm_vllm.vllm_compat import attach, command_line


def register() -> None:
    """Add the command-line flags; replace the covered models only if the plugin is enabled.

    The plugin does not change vLLM if ``VLLM_PLUGINS`` (which ``--plugins flashvlm`` sets) does
    not name it.
    """
    command_line.add_flags(activate)
    if is_enabled():
        activate()


def activate() -> None:
    """Replace the covered models and attach to the engine. Idempotent.

    Raises:
        UnsupportedVLLMError: vLLM is older than the supported releases. In a ``vllm`` command the
            process exits with that message instead.

    """
    from vllm import ModelRegistry

    from flashvlm_vllm.vllm_releases import UnsupportedVLLMError, check_vllm

    try:
        check_vllm()
    except UnsupportedVLLMError as error:
        if command_line.is_command_line():
            sys.exit(f"flashvlm: {error}")
        raise
    for architecture, target in classes().items():
        ModelRegistry.register_model(architecture, target)
    attach.to_engine()
