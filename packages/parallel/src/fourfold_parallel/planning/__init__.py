"""From the planner's numbers to a person: tables, drawings, a page, a trace, and short runs that verify."""
