"""The paper's experiment on SmolLM2-135M: a head on the frozen model, a hard KL budget, VADER as the reward.

    python -m launch.fetch smollm2
    python -m launch.train --config=configs/smollm2_teacher.py --workdir=runs/smollm2

The agent is the teacher, the model itself the student; whoever has the turn also writes the speaker markers. On two
cores an iteration takes 65 to 80 seconds (about 60 tokens a second, update included), the whole half an hour. That
is little training: after three iterations the return has gone from 0.15 to 0.7 (16 episodes each, ± 0.2) for 3 nats.
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
