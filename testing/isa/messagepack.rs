//! As much of MessagePack as the metadata of code objects uses: maps, arrays, strings, integers, booleans.

/// A value; numbers are as large as an `i128` so that every integer fits.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Nothing,
    Bool(bool),
    Number(i128),
    Text(String),
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
}

impl Value {
    pub fn get(&self, key: &str) -> Option<&Value> {
        let Value::Map(pairs) = self else { return None };
        pairs.iter().find(|(own, _)| own.text() == Some(key)).map(|(_, value)| value)
    }

    pub fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }

    pub fn number(&self) -> Option<i128> {
        if let Value::Number(number) = self { Some(*number) } else { None }
    }

    pub fn items(&self) -> Option<&[Value]> {
        if let Value::Array(items) = self { Some(items) } else { None }
    }
}

pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    let mut reader = Reader { bytes, at: 0 };
    reader.value()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let taken = self.bytes.get(self.at..self.at + count).ok_or("MessagePack that ends too early")?;
        self.at += count;
        Ok(taken)
    }

    fn unsigned(&mut self, bytes: usize) -> Result<u64, String> {
        Ok(self.take(bytes)?.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    fn text(&mut self, length: usize) -> Result<Value, String> {
        Ok(Value::Text(String::from_utf8_lossy(self.take(length)?).into_owned()))
    }

    fn array(&mut self, length: usize) -> Result<Value, String> {
        (0..length).map(|_| self.value()).collect::<Result<_, _>>().map(Value::Array)
    }

    fn map(&mut self, length: usize) -> Result<Value, String> {
        (0..length).map(|_| Ok((self.value()?, self.value()?))).collect::<Result<_, String>>().map(Value::Map)
    }

    fn value(&mut self) -> Result<Value, String> {
        let tag = self.take(1)?[0];
        match tag {
            0x00..=0x7f => Ok(Value::Number(tag.into())),
            0x80..=0x8f => self.map((tag & 15).into()),
            0x90..=0x9f => self.array((tag & 15).into()),
            0xa0..=0xbf => self.text((tag & 31).into()),
            0xc0 => Ok(Value::Nothing),
            0xc2 | 0xc3 => Ok(Value::Bool(tag == 0xc3)),
            0xcc..=0xcf => self.unsigned(1 << (tag - 0xcc)).map(|n| Value::Number(n.into())),
            0xd0..=0xd3 => {
                let bytes = 1usize << (tag - 0xd0);
                let shift = 64 - 8 * bytes;
                self.unsigned(bytes).map(|n| Value::Number((((n << shift) as i64) >> shift).into()))
            }
            0xd9..=0xdb => {
                let length = self.unsigned(1 << (tag - 0xd9))?;
                self.text(length as usize)
            }
            0xdc | 0xdd => {
                let length = self.unsigned(2 << (tag - 0xdc))?;
                self.array(length as usize)
            }
            0xde | 0xdf => {
                let length = self.unsigned(2 << (tag - 0xde))?;
                self.map(length as usize)
            }
            0xe0..=0xff => Ok(Value::Number((tag as i8).into())),
            _ => Err(format!("MessagePack of kind {tag:#x} is not read here")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_s_encodings_are_read() {
        // {"a": [1, -1, 300, true], "b": "x"}
        let bytes = [0x82, 0xa1, b'a', 0x94, 1, 0xff, 0xcd, 1, 44, 0xc3, 0xa1, b'b', 0xd9, 1, b'x'];
        let value = parse(&bytes).unwrap();
        let items = value.get("a").unwrap().items().unwrap();
        assert_eq!(items[..3].iter().map(|item| item.number().unwrap()).collect::<Vec<_>>(), [1, -1, 300]);
        assert_eq!(items[3], Value::Bool(true));
        assert_eq!(value.get("b").unwrap().text(), Some("x"));
        assert!(parse(&bytes[..9]).is_err());
    }
}
