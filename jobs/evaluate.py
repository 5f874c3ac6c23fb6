"""ray job submit --working-dir . -- python jobs/evaluate.py …: the arguments of `mulcot evaluate`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("evaluate")
