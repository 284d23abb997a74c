"""How to install what only the trainer and the command line need."""

TRAINING = 'pip install "transformers>=5.17" accelerate tqdm rich matplotlib jinja2 pyyaml'
