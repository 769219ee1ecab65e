"""configs/smollm2_teacher.py: an agent can learn there only what its episodes contain, replies and teacher's turns."""
import pytest

from configs import smollm2_teacher
from kl_reg import validation
from kl_reg.analysis.compare import single_policy
from kl_reg.pretrained import folders
from kl_reg.types import AGENT

EPISODES, LENGTH = 4, 64        # half of the configuration's length


@pytest.mark.skipif(not folders.place("smollm2").is_dir(), reason="`python -m launch.fetch smollm2` first")
def test_the_base_as_agent_gets_replies_and_is_not_silent():
    config = smollm2_teacher.get_config()
    validation.validate(config)
    changes = {name: config.env[name] for name in ("opening", "teacher", "student", "end", "markers")}
    policy = single_policy.open_policy(config.model.path, "run", EPISODES, changes, LENGTH)
    turns = policy.team.program.task.env.read(single_policy.sample(policy.team, EPISODES, seed=0).transcript)
    assert sum(turn.scored for turn in turns) >= 1.5 * EPISODES     # 0.25 an episode of 160 tokens: nothing is learned
    spoken = [turn for turn in turns if turn.role == AGENT and turn.finished]
    assert sum(not turn.text for turn in spoken) <= 0.1 * len(spoken)
