"""ray job submit --working-dir . -- python jobs/assistant.py …: the arguments of `mulcot assistant`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("assistant")
