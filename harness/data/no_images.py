"""A data set without images: their shape, and classes or prompts."""

from __future__ import annotations

from harness.config.schema import PROMPT_KEYS
from harness.data.registry import FORMS, DataSource
from harness.errors import Problem


@FORMS.register("no-images")
class NoImages(DataSource):
    @property
    def description(self) -> str:
        return "prompts without images" if self.section.prompts else "a data set without images"

    @property
    def keys(self) -> frozenset[str]:
        return {"image_shape"} | (PROMPT_KEYS if self.section.prompts else {"num_classes"})

    @property
    def image_shape(self):
        return self.section.image_shape

    @property
    def num_classes(self) -> int:
        return self.section.num_classes or 0

    def check(self) -> list[Problem]:
        shape = self.section.image_shape
        if shape is None:
            return [
                Problem("data.image_shape", "missing-key", "required for prompts without a source")
            ]
        problems = super().check()
        if shape[1] != shape[2]:
            message = f"expected (channels, height, width) of square images, got {list(shape)}"
            problems.append(Problem("data.image_shape", "invalid-value", message))
        return problems
