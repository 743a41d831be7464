#pragma once
#include "cuda_emulated.h"
