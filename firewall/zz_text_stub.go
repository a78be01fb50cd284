package firewall

func ruleText(b []byte) string              { return "rule" }
func tableText(b []byte) string             { return "table" }
func chainText(b []byte) string             { return "chain" }
func setText(b []byte) string               { return "set" }
func elementText(set, e, end []byte) string { return "element" }
func objectText(b []byte) string            { return "object" }
