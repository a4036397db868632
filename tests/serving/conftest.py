from typing import Any

import pytest
from serving_agents import small_agent

from addiff_env.agent import Agent
from addiff_env.cli.web import fixed_picture
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.serving.studio import Studio


@pytest.fixture(scope="session")
def agent(small_kwargs: dict[str, Any]) -> Agent:
    return small_agent(small_kwargs)


@pytest.fixture(scope="session")
def pipe(agent: Agent) -> AdaptivePipeline:
    return AdaptivePipeline(make_agent_env(agent, 1), agent)


@pytest.fixture
def studio(pipe: AdaptivePipeline) -> Studio:
    return Studio(pipe, fixed_picture)
