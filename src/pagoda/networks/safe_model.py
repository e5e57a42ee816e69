"""Models of our own that load from safetensors alone: diffusers falls back to a pickle where nobody forbids it."""

from __future__ import annotations

from typing import Any

from diffusers.models import ModelMixin

from pagoda.errors import ConfigError


class SafeModel(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """diffusers' `ModelMixin` without pickles."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As diffusers', from safetensors only.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the hub.
            **options: As diffusers'.

        Raises:
            ConfigError: `use_safetensors=False`.
            OSError: there are no safetensors.
        """
        if not options.setdefault("use_safetensors", True):
            raise ConfigError(
                f"{cls.__name__} reads safetensors only, because loading a pickle can run any code; leave out use_safetensors=False. "
                "A pickle can be converted where you trust it: safetensors.torch.save_file(state_dict, 'name.safetensors')."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **options)
