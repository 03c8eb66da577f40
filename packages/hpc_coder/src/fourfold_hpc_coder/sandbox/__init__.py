"""Running strangers' programs: what a job is, the walls around it, and the supervisor outside them."""
