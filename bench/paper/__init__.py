"""The paper's experiments: what is run, how it is measured, and the page that is written from the results alone."""
