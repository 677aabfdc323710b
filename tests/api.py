"""What tests need of the package's inside, in one place: when the inside changes, this file changes with it."""

from hiddenkey import attention_paths as attention_paths
from hiddenkey import dropout as dropout
from hiddenkey.hf import attention_backend as attention_backend
from hiddenkey.hf import compared_outputs as compared_outputs
from hiddenkey.hf import rate_monitor as rate_monitor
from hiddenkey.hf import sites as sites
from hiddenkey.hf import training_step as training_step
from hiddenkey.hf.attachment import StepState as StepState
from hiddenkey.hf.attachment import step_state as step_state
from hiddenkey.hf.doctor import examination as examination
from hiddenkey.hf.doctor import rates as rates
from hiddenkey.hf.doctor import surroundings as surroundings
from hiddenkey.hf.doctor.outputs import difference as difference
from hiddenkey.hf.rate_monitor import FALSE_ALARM as FALSE_ALARM
from hiddenkey.hf.rate_monitor import RateWatch as RateWatch
from hiddenkey.hf.rate_monitor import interval as interval
from hiddenkey.hf.rate_monitor import log_what_is_wrong as log_what_is_wrong
from hiddenkey.hf.rate_monitor import surprise as surprise
from hiddenkey.hf.structure import find_transformer as find_transformer
from hiddenkey.masks import Tally as Tally
from hiddenkey.masks import draw as draw
from hiddenkey.masks import is_recomputing as is_recomputing
