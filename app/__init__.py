"""The backend."""

import gc

PACE = gc.get_threshold()

# What is imported is no garbage, and at Python's own pace all of it is looked at again and again:
# that takes a tenth of the time of a start. At its end `app.main` goes back to that pace.
gc.set_threshold(10_000)
