import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")     # it would advise to install torch at every start
