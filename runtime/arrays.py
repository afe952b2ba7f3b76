"""What arrays are called in annotations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
