"""From a prompt to tokens and pixels: prefill, one step, the scan, and the pipeline users hold."""
