"""Soft targets: the store that a teacher's run is written to, and the loss of a student that learns from it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from processes import ROOT

from sbs_jax.data import registry
from sbs_jax.data import soft_targets as store
from sbs_jax.prediction import soft_targets as scoring
from sbs_jax.student import families, partitioning, soft_targets
from sbs_jax.training import students
