use crate::checks;
checks! {}
