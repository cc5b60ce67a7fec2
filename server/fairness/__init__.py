"""Sharing slots, image decoder processes, bytes and refusals among clients."""
