"""Other methods, each as strong as it can be made, to compare with."""
