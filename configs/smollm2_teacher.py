"""The paper's experiment on SmolLM2-135M: a head on the frozen model, a hard KL budget, VADER as the reward.

    python -m launch.fetch smollm2
    python -m launch.train --config=configs/smollm2_teacher.py --workdir=runs/smollm2

The agent is the teacher, the model itself the student; whoever has the turn also writes the speaker markers. On two
cores an iteration takes 65 to 80 seconds (about 60 tokens a second, update included), the whole with its evaluation
about 40 minutes. That is little training: the return goes from 0.37 ± 0.07 to 0.62 ± 0.09 (64 episodes) for 5.4 nats.
"""
from kl_reg.config import default

OPENING = """\
Student: Good morning! Are we going to talk about the water cycle today?

Teacher: Yes, we are. Who remembers what happens to the water in a puddle when the sun shines on it?

Student: It evaporates and goes up into the air.

"""


def get_config():
    config = default()
    config.model.path = "smollm2"
    config.env.opening = OPENING
    config.env.teacher, config.env.student, config.env.end = "Teacher:", "Student:", "\n\n"
    config.env.markers = "written"
    config.env.length = 256
    config.kl.budget = 10.0
    config.rl.episodes, config.rl.iterations = 16, 25
    config.evaluation.episodes = 64
    return config
