"""`python -m mulcot_ray.cli`: the same as `mulcot`."""

from mulcot_ray.cli import main

main()
