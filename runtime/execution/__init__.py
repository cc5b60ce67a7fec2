"""Both graphs run: image K/V into slots, a token for each row; in host memory or on a device."""
