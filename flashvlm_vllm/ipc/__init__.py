# SPDX-License-Identifier: Apache-2.0
"""What crosses between the API process and the workers, packed and unpacked side by side."""
