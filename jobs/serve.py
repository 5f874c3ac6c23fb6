"""ray job submit --working-dir . -- python jobs/serve.py …: the arguments of `mulcot serve`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("serve")
