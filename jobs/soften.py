"""ray job submit --working-dir . -- python jobs/soften.py …: the arguments of `mulcot soften`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("soften")
