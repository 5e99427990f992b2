"""Operations: one folder each, holding its public function and its backends."""
