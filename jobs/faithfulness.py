"""ray job submit --working-dir . -- python jobs/faithfulness.py …: the arguments of `mulcot faithfulness`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("faithfulness")
