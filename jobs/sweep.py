"""ray job submit --working-dir . -- python jobs/sweep.py …: the arguments of `mulcot sweep`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("sweep")
