"""Prompts in, pictures out, with a trained agent deciding each picture's steps."""

from addiff_env.pipeline.adaptive import SHIPPED_AGENT, AdaptivePipeline
from addiff_env.pipeline.lanes import FAULT, LaneScheduler, LaneStep, Request, make_agent_env, price_of
from addiff_env.pipeline.output import AdaptivePipelineOutput, GeneratedImage

__all__ = [
    "FAULT",
    "SHIPPED_AGENT",
    "AdaptivePipeline",
    "AdaptivePipelineOutput",
    "GeneratedImage",
    "LaneScheduler",
    "LaneStep",
    "Request",
    "make_agent_env",
    "price_of",
]
