"""Twenty optimizer steps against a plain loop of PyTorch and timm.

The loop below knows nothing of this project: timm's network, AdamW, averaging, loss and clipping,
and the learning rate and its layer-wise scales written out by hand from their definitions. Both
sides start from the same weights and see the same batches, in fp32, with two passes a step.
"""

import re
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, dispatch_clip_grad
from torch import nn

from convnext_cli.data.build import build_mix
from convnext_cli.data.reader import Batch
from convnext_cli.models.build import build_model
from convnext_cli.optim.ema import make_averaged
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, make_plan
from convnext_cli.recipe.schema import (
    Ema,
    Mix,
    Model,
    Optim,
    Recipe,
    Schedule,
)
from convnext_cli.training.build import build_trainer, quiet_lightning
from convnext_cli.training.fit import make_card
from convnext_cli.training.task import Classifier
from convnext_cli.training.throughput import DataClock
