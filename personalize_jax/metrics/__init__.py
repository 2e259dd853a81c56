"""The paper's metrics: fidelity to subject and prompt, preservation of the class, diversity."""
