"""What a run takes: formulas, the traced engine, the plan, and the check against what is measured."""
