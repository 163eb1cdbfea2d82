"""The backend."""

import gc

# What is imported is no garbage, and Python's own pace would have all of it looked at for some
# again and again: that is a tenth of the time that a start takes.
gc.set_threshold(10_000)
