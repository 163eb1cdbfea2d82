"""Faults that are injected for real: processes killed and stopped, connections cut, stores gone.

just faults                     the long form, with its figures
just test tests/faults          the short form, as CI runs it
"""
