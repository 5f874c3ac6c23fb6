"""ray job submit --working-dir . -- python jobs/nightly.py …: the arguments of `mulcot nightly`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("nightly")
