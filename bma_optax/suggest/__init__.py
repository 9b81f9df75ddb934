"""From a loss to the partition that suits it: measured, before training.

_structure    products with a few vectors -> reach, fields, edges, stiffness of arrays
_rules        that structure -> a rule, spelled in the words of ``partitions``
_trial        conjugate gradients with the blocks and without: whether they pay
_report       the table that is printed
_suggest      the public function
"""
