"""A method, as a plug-in file."""

import torch

from harness.method import METHODS, Method, MethodConfig, OptimizerConfig, Phase, ours


@METHODS.register("teacher-output")
class TeacherOutput(Method):
    """The student's images move towards what the teacher makes of their noised versions."""

    paper = "an example"

    class Config(MethodConfig):
        batch: int = ours(16, "small", gt=0)
        sigma_init: float = ours(10.0, "noise level of the student", gt=0)
        lr: float = ours(1e-3, "Adam", gt=0)

    def phases(self):
        return [Phase("generator", "student", self.loss, OptimizerConfig(lr=self.config.lr))]

    def loss(self, context):
        images = context.generated()
        sigma = torch.ones(len(context), device=images.x.device)
        with torch.no_grad():
            noised = context.noised(images.x, sigma)
            target = context.networks["teacher"](noised, sigma, images.condition)
        return (images.x - target).square().mean()
